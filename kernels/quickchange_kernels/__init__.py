"""Hot operations behind one contract each: a plain reference and one version a device."""
