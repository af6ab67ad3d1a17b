"""Many runs with one command: jobs that can be started again, and a table of what came out."""
