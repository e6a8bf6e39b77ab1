"""What an adapter learned: subspaces, amplification, spectra, sweeps; read from files alone."""
