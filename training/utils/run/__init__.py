"""The life of a process: start, folders, ranks and hosts, signals, phases, the watchdog."""
