"""Pack and unpack of each stored layout in plain torch: the reference every kernel must agree with, on any device."""
