"""What an edit did inside a model: an original and an edited model, side by side.

`inspection` ties it together: both models read the same rows (`activations`), the change of the
residual stream is held against one direction (`direction`), the change of the outputs against
noise (`outputs`), every tensor against its original (`weights`), and the numbers are put into
words (`summary`).
"""
