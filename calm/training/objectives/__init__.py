"""What a trained model may learn after pre-training, instead of its head's loss."""
