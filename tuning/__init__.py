"""Finding, on the CPU itself, what is best to decide about each kernel; keeping what was found; and compiling by it."""
