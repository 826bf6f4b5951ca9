"""What this machine is and can do; choices that depend on the device are made here."""
