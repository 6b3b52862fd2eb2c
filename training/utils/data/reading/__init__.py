"""From a name to raw rows: sources, folders, files, tables."""
