"""What every script needs: errors, the command line, files, the machine, several processes."""
