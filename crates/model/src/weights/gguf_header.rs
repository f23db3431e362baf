//! What candle-core's reader of GGUF headers takes on trust, looked at before it reads them.

/// Elements of all arrays of the metadata together. Each takes 32 bytes in memory and as little as
/// one in the file; the largest vocabularies, with merges, scores and types, have some two million.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 23;
/// Of arrays in arrays; candle-core refuses deeper ones.
const MAX_DEPTH: usize = 64;
const ALIGNMENT: &str = "general.alignment";

// Numbers of the types of values.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Walks over the metadata. What is cut off or of an unknown type is candle-core's to report.
///
/// # Errors
/// A few words on an alignment of 0, by which candle-core would divide, or on arrays that would take
/// far more memory than they have bytes.
pub(super) fn check(file: &[u8]) -> Result<(), String> {
    let mut header = Header { rest: file, wide: true, n_elements: 0 };
    header.walk().unwrap_or(Ok(()))
}

struct Header<'a> {
    rest: &'a [u8],
    /// Lengths have 8 bytes; in version 1 they have 4.
    wide: bool,
    n_elements: u64,
}

impl<'a> Header<'a> {
    /// None: the header ends, or goes on in a way that is not known.
    fn walk(&mut self) -> Option<Result<(), String>> {
        self.take(4)?;
        self.wide = self.u32()? > 1;
        let _n_tensors = self.length()?;
        for _ in 0..self.length()? {
            let length = self.length()?;
            let key = self.take(length)?;
            let kind = self.u32()?;
            let value = self.rest;
            self.skip(kind, 0)?;
            // candle-core cuts zeros off the ends of texts.
            let key = key.iter().rposition(|&byte| byte != 0).map_or(&[][..], |last| &key[..=last]);
            if key == ALIGNMENT.as_bytes() && is_zero(kind, value) {
                return Some(Err(format!("{ALIGNMENT} is 0, expected 32 or another power of two")));
            }
            if self.n_elements > MAX_ARRAY_ELEMENTS {
                return Some(Err(format!(
                    "the arrays of its metadata have more than {MAX_ARRAY_ELEMENTS} elements"
                )));
            }
        }
        Some(Ok(()))
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(usize::try_from(length).ok()?)?;
        self.rest = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        let (bytes, rest) = self.rest.split_first_chunk::<4>()?;
        self.rest = rest;
        Some(u32::from_le_bytes(*bytes))
    }

    fn length(&mut self) -> Option<u64> {
        if !self.wide {
            return self.u32().map(u64::from);
        }
        let (bytes, rest) = self.rest.split_first_chunk::<8>()?;
        self.rest = rest;
        Some(u64::from_le_bytes(*bytes))
    }

    /// Goes over one value.
    fn skip(&mut self, kind: u32, depth: usize) -> Option<()> {
        match kind {
            STRING => {
                let length = self.length()?;
                self.take(length)?;
            }
            ARRAY if depth < MAX_DEPTH => {
                let (kind, n) = (self.u32()?, self.length()?);
                self.n_elements = self.n_elements.saturating_add(n);
                match size(kind) {
                    Some(size) => drop(self.take(n.checked_mul(size)?)?),
                    None => (0..n).try_for_each(|_| self.skip(kind, depth + 1))?,
                }
            }
            _ => drop(self.take(size(kind)?)?),
        }
        Some(())
    }
}

/// Bytes of a plain value.
fn size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Whether candle-core would take the value for an alignment of 0.
fn is_zero(kind: u32, value: &[u8]) -> bool {
    let is_short_number = matches!(kind, 0..=5);
    let length = size(kind).unwrap_or(0) as usize;
    is_short_number && value.iter().take(length).all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of version 3 with no tensors and one field.
    fn header(key: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        file.extend((key.len() as u64).to_le_bytes());
        file.extend(key);
        file.extend(kind.to_le_bytes());
        file.extend(value);
        file
    }

    #[test]
    fn an_alignment_of_zero_is_refused_in_every_width() {
        for (kind, value) in [(0, &[0][..]), (2, &[0; 2]), (4, &[0; 4]), (5, &[0; 4])] {
            for key in [&b"general.alignment"[..], b"general.alignment\0\0"] {
                let error = check(&header(key, kind, value)).unwrap_err();
                assert!(error.starts_with("general.alignment is 0"), "{error}");
            }
        }
        check(&header(b"general.alignment", 4, &[32, 0, 0, 0])).unwrap();
        check(&header(b"general.alignmenu", 4, &[0; 4])).unwrap();
    }

    #[test]
    fn arrays_are_counted_before_they_are_read() {
        let array = |n: u64| [&[0, 0, 0, 0][..], &n.to_le_bytes(), &vec![1; n as usize]].concat();
        check(&header(b"a", 9, &array(1 << 23))).unwrap();
        let error = check(&header(b"a", 9, &array((1 << 23) + 1))).unwrap_err();
        assert!(error.contains("more than 8388608 elements"), "{error}");
        // What is not there is candle-core's to report, at once.
        check(&header(b"a", 9, &[0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255])).unwrap();
        check(&header(b"a", 9, &[9, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255])).unwrap();
    }

    #[test]
    fn any_beginning_of_a_header_is_walked_over() {
        let texts = [&[8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0][..], &[1, 0, 0, 0, 0, 0, 0, 0, b'x']];
        let whole = header(b"a", 9, &texts.concat());
        for end in 0..whole.len() {
            check(&whole[..end]).unwrap();
        }
    }
}
