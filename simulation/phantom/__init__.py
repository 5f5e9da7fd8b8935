"""Phantom hospitals: synthetic breast ultrasound with masks, labels and patients.

Phantoms allow a federation to be tried, tested and measured without patient data, with sites that
differ the way hospitals do (scanner, settings, population).

Phantoms are not a model of anatomy and not a benchmark. The classes are easier to distinguish than
in a clinic. A result on phantoms shows that the software works and says nothing about patients.
"""
