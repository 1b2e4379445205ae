"""Hosts other than transformers and TRL; each file imports its host, and nothing else in the
package imports these (docs/integrations.md).
"""
