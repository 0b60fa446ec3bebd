"""`draftsmith doctor`: why is acceptance low?"""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.evaluate.doctor.doctor_command")
