"""What this machine is and can do, and every choice that depends on the device."""
