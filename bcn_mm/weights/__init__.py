"""Other people's weights: single norms, whole checkpoints, safe reading.

- :mod:`.norm_layouts`: the layouts of a single norm, read into BCN's.
- :mod:`.report`: the log lines that say how a model was loaded.
- :mod:`.architectures`: the names and shapes of the authors' networks.
- :mod:`.authors`: conversion of whole checkpoints from and to their layout.
- :mod:`.loading`: what a model needs to see of a whole state dict.
- :mod:`.reading`: files from strangers, and whether they fit.
"""

# Nothing is imported here: the layers read single norms, and so import
# .norm_layouts and .report, which import no layers; the other modules do.
