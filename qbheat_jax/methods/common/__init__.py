"""What several methods share: targets, masks, running an encoder."""
