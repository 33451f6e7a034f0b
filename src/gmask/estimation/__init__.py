"""How much memory does a model take, before anything of it is loaded?"""
