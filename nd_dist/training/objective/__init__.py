"""What a training minimises: losses, mixing, augmentation, the teacher."""
