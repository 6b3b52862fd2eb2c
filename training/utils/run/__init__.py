"""The life of a process: start, folders, ranks and hosts, signals, the watchdog."""
