"""Where hornbeam meets Keras: the only room that replaces anything of Keras'."""
