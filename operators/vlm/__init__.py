"""Vision-language models behind one interface: requests in, answers out."""
