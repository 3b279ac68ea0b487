"""What several benchmarks share; they are run by hand."""

import simple_autoencoder as simple
import stack_autoencoder as stack
import util


def untrained(kind="simple"):
    """Encoder and decoder of `simple_autoencoder.py`, or of `stack_autoencoder.py` for the kind `stacked`."""
    encoder, decoder = simple.build_encoder(), simple.build_decoder()
    simple.start_as_identity(encoder, decoder)
    if kind == "stacked":
        return stack.stack_encoder(encoder), stack.stack_decoder(decoder)
    return encoder, decoder


def write_figures(out, figures):
    """Write figures, a dict by name, to `figures/benchmark_NAME.png` in the folder `out`."""
    for name, figure in figures.items():
        path = out / f"figures/benchmark_{name}.png"
        util.save_figure(figure, path)
        print(f"Written: {path}")
