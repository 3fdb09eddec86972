"""Position encodings and the scalings of rotary ones."""
