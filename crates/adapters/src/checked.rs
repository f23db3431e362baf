//! safetensors files from outside.

use safetensors::tensor::{Metadata, SafeTensors};

/// The file and its header. Reads that and holds it against the file's length, where no sum of lengths can overflow;
/// the library's own check adds them up.
///
/// # Errors
/// What is wrong with the file, for its reader to put behind the path.
pub(crate) fn safetensors(bytes: &[u8]) -> Result<(SafeTensors<'_>, Metadata), String> {
    let wrong = |problem: String| format!("not a safetensors file ({problem}); was it cut off?");
    let header = bytes.split_first_chunk::<8>().and_then(|(length, rest)| {
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        rest.get(..length)
    });
    let header = header.ok_or_else(|| wrong("its header is not whole".into()))?;
    let metadata: Metadata =
        serde_json::from_slice(header).map_err(|e| wrong(format!("its header: {e}")))?;
    let (expected, found) = (metadata.data_len(), bytes.len() - 8 - header.len());
    if expected != found {
        return Err(wrong(format!("its tensors take {expected} bytes, {found} are there")));
    }
    let file = SafeTensors::deserialize(bytes).map_err(|e| wrong(e.to_string()))?;
    Ok((file, metadata))
}
