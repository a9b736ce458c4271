"""The ops of this package inside engines that people already run, each by its own extension point.

Each file here is imported by whoever wants it: it needs what it extends.
"""

NAME = "llama_fast"  # by which engines know what is registered here
