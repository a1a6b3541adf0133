"""What a command reads: folders of images, shards, data sets, questions and prompts; each listed first, read one by one."""
