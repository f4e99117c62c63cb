"""What makes a layer, a head or a neuron worth keeping: one file per criterion."""
