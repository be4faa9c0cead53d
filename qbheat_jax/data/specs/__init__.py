"""Data specs: how an example of a source becomes what a model takes, one file a shape of batch."""
