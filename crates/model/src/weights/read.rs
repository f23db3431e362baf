//! From the bytes of a mapped file to a tensor: one copy, converted on the way.

use super::{Entry, Mapped, Stored, WeightsError};
use crate::host;
use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, quantized::QuantizedType};
use std::borrow::Cow;
use tch::{Device, Kind, TchError, Tensor};

/// Elements dequantised at a time (256 KiB as f32), so that a large embedding never lies in memory
/// in two forms, and the passing buffers leave no large holes between the tensors that stay.
const CHUNK_ELEMENTS: usize = 1 << 16;

/// The tensor of `entry`, shape as stored, in `kind` on `device`.
pub(super) fn tensor(
    file: &Mapped,
    entry: &Entry,
    kind: Kind,
    device: Device,
) -> Result<Tensor, WeightsError> {
    let bytes = &file.bytes()[entry.bytes.clone()];
    let failed =
        |source| WeightsError::Tensor { name: entry.name.clone(), source: Box::new(source) };
    let tensor = match &entry.stored {
        Stored::Plain(stored) => {
            let expected = entry.elements() * stored.elt_size_in_bytes();
            if expected != bytes.len() {
                return Err(file.bad(format!(
                    "{} has {} bytes, its shape {:?} needs {expected}",
                    entry.name,
                    bytes.len(),
                    entry.shape
                )));
            }
            plain(file.slice(entry.bytes.clone()), *stored, entry, kind).map_err(failed)?
        }
        Stored::Quantised(dtype) => {
            quantised(bytes, *dtype, entry, kind, CHUNK_ELEMENTS).map_err(failed)?
        }
        Stored::Other { found, known } => {
            return Err(WeightsError::UnsupportedTensorType {
                file: file.path.clone(),
                tensor: Some(entry.name.clone()),
                found: found.clone(),
                known,
            });
        }
    };
    file.release(entry.bytes.clone());
    tensor.f_to_device(device).map_err(failed)
}

/// The caller checked that shape and kind need exactly these bytes.
fn plain(bytes: Bytes, stored: Kind, entry: &Entry, kind: Kind) -> Result<Tensor, TchError> {
    let target = Tensor::f_empty(&entry.shape, (kind, Device::Cpu))?;
    if !bytes.is_empty() {
        write(&target, &host::f_tensor_over(bytes, &entry.shape, stored)?, entry.heads)?;
    }
    Ok(target)
}

/// Dequantises whole rows (whole heads, where the rows of a head are permuted) chunk by chunk.
fn quantised(
    bytes: &[u8],
    dtype: GgmlDType,
    entry: &Entry,
    kind: Kind,
    chunk_elements: usize,
) -> Result<Tensor, TchError> {
    let target = Tensor::f_empty(&entry.shape, (kind, Device::Cpu))?;
    if bytes.is_empty() {
        return Ok(target);
    }
    let (rows, row_elements) = match entry.shape.as_slice() {
        [rows, ..] if entry.shape.len() > 1 => (*rows as usize, entry.elements() / *rows as usize),
        _ => (1, entry.elements()),
    };
    let flat = target.f_view([rows as i64, row_elements as i64])?;
    let group = entry.heads.map_or(1, |heads| (rows / heads as usize).max(1));
    let chunk = (chunk_elements / (group * row_elements)).max(1) * group;
    let row_bytes = row_elements / dtype.block_size() * dtype.type_size();
    for first in (0..rows).step_by(chunk) {
        let n = chunk.min(rows - first);
        let values = dequantise(dtype, &bytes[first * row_bytes..(first + n) * row_bytes])?;
        let size = [n as i64, row_elements as i64];
        let source = host::tensor_of(values, &size);
        let heads = entry.heads.map(|_| (n / group) as i64);
        write(&flat.f_narrow(0, first as i64, n as i64)?, &source, heads)?;
    }
    Ok(target)
}

fn dequantise(dtype: GgmlDType, blocks: &[u8]) -> Result<Vec<f32>, TchError> {
    let elements = blocks.len() / dtype.type_size() * dtype.block_size();
    let blocks: Box<dyn QuantizedType> = dtype.from_data(Cow::Borrowed(blocks));
    match blocks.dequantize(elements) {
        Ok(CpuStorage::F32(values)) => Ok(values),
        Ok(_) => Err(TchError::Kind("dequantised to something else than f32".into())),
        Err(e) => Err(TchError::Convert(e.to_string())),
    }
}

/// Copies `source` into `target` (same shape, any kinds). With `heads`, undoes the row order of
/// llama GGUF files: llama.cpp's converter stores each head's rows `[D]` so that the two halves of
/// a rotary pair stand next to each other, `[D/2, 2]`; Hugging Face has them as `[2, D/2]`
/// (Transformers: `LlamaTensorProcessor._reverse_permute_weights`).
fn write(target: &Tensor, source: &Tensor, heads: Option<i64>) -> Result<(), TchError> {
    match heads {
        None => target.shallow_clone().f_copy_(source)?,
        Some(heads) => {
            let half = target.size()[0] / heads / 2;
            target
                .f_view([heads, 2, half, -1])?
                .f_transpose(1, 2)?
                .f_copy_(&source.f_view([heads, half, 2, -1])?)?
        }
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// In one piece, row by row (head by head), and with a last piece that is smaller.
    #[test]
    fn chunks_do_not_change_what_is_dequantised() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf");
        let opened = super::super::gguf::open(&fixtures.join("llama.gguf")).unwrap();
        for entry in opened.entries.values() {
            let Stored::Quantised(dtype) = entry.stored else { continue };
            let bytes = &opened.files[0].bytes()[entry.bytes.clone()];
            let load = |chunk| quantised(bytes, dtype, entry, Kind::Float, chunk).unwrap();
            let whole = load(usize::MAX);
            for chunk in [1, 3 * 8 * 256] {
                assert_eq!(load(chunk), whole, "{} by {chunk}", entry.name);
            }
        }
    }
}
