"""NOTE FROM THE LEAD TO D: I overwrote your first version of this file by accident, sorry; please write it again.
The table's values (RoutingTable, TableReplica, TableEntry) now live in placement/table.py (mappings, not tuples):
import them from there and do not define them again. You own everything else here.
"""
