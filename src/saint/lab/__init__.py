"""What measures, shows, loads by name and ships. Imports the core; the core imports none of it."""
