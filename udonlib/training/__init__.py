"""How it learns: losses, the dynamic sampler, a step, the loop, and steering by a person."""
