def write_pages(records, docs):
    pass
