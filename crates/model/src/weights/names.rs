//! One name for a tensor, whatever prefix its checkpoint uses.

/// What `AutoModelForCausalLM` puts before the names of the base model; files saved from the base
/// model alone lack it.
const BASE_PREFIXES: [&str; 2] = ["model.", "transformer."];

/// The name without the base model's prefix: "transformer.h.0.attn.c_attn.weight" and
/// "h.0.attn.c_attn.weight" are the same tensor.
pub(super) fn canonical(name: &str) -> &str {
    BASE_PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
}

/// The name most similar to `wanted`, compared without prefixes.
pub(super) fn closest<'a>(
    wanted: &str,
    names: impl Iterator<Item = &'a String>,
) -> Option<&'a String> {
    names.min_by_key(|name| strsim::levenshtein(canonical(wanted), canonical(name)))
}
