"""The one convention of labels that data, loss and evaluation share."""

# Also the default of torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100
