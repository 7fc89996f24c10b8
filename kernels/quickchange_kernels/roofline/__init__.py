"""Time floors of the kernels on an H100, computed: no GPU needed, and none has checked them.

python -m quickchange_kernels.roofline                          prints the tables
python -m quickchange_kernels.roofline --write docs/kernels.md  puts them into the document

machine          the GPU and the models
floors           bytes and operations of each kernel, and the least time they take
compiled         costs of the compiled kernels: instructions, waves, bytes in flight
roofline_tables  the tables, and their places in the document
"""
