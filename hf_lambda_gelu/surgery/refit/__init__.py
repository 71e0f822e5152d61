"""The linear maps after the activations, refit in closed form so that the network stays what it was."""
