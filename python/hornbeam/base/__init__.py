"""Facts, files and threads: knows neither Keras nor a backend."""
