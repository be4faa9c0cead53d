"""How an example of a source becomes what a model takes."""
