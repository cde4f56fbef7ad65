import logging

# DeepSpeed warns at each import on a machine without a GPU that it found none.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
