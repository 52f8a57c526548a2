"""Which step of each trajectory calibrates: TDAC, and the strategies it is compared with."""
