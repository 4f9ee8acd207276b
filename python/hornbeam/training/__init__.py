"""What a training keeps: checkpoints, backups, best models, data that goes on where it stopped."""
