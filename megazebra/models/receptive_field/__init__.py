"""The receptive-field test: which keys every kind of layer really sees, under a layout, against which it should."""
