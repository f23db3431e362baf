//! Tensors and bytes that share one piece of host memory, so that what comes from a socket or a file,
//! or goes to a socket, is not copied once more; and the few calls of libtorch, of the system and of
//! the C library that have no safe names.
//!
//! All unsafe code of this repository is here. For shared memory it rests on this: memory is shared with
//! its owner (a tensor's reference or a [`Bytes`]), which is dropped when nobody reads any more, on
//! whichever thread that is; the memory of both stays where it is as long as the owner lives. As
//! everywhere in tch nobody watches writes through another reference to the same tensor: give tensors
//! here that nothing writes to any more, and change none in place that came from here.

#![allow(unsafe_code)]

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};
use std::ffi::{CStr, c_void};
use std::fs::File;
use std::io;
use std::ops::Range;
use tch::{Device, Kind, TchError, Tensor};

/// Functions of libtorch's stable C interface that tch has no names for.
mod torch {
    use std::ffi::c_void;
    use torch_sys::C_tensor;

    unsafe extern "C" {
        pub fn aoti_torch_device_type_cpu() -> i32;
        pub fn aoti_torch_layout_strided() -> i32;
        pub fn aoti_torch_dtype_float32() -> i32;
        pub fn aoti_torch_dtype_bfloat16() -> i32;
        pub fn aoti_torch_dtype_float16() -> i32;
        pub fn aoti_torch_get_storage_size(tensor: *const C_tensor, bytes: *mut i64) -> i32;
        pub fn torch_from_blob(
            data: *mut c_void,
            n_dimensions: i64,
            sizes: *const i64,
            strides: *const i64,
            storage_offset: i64,
            dtype: i32,
            device_type: i32,
            device_index: i32,
            tensor: *mut *mut C_tensor,
            layout: i32,
            metadata: *const u8,
            metadata_size: i64,
            deleter: extern "C" fn(*mut c_void, *mut c_void),
            deleter_context: *mut c_void,
        ) -> i32;
    }
}

/// Fewer bytes than this are copied, which costs nothing: a short message may lie in a buffer that
/// was made for a long one, and a tape over it would keep all of that.
const SHARED_FROM_BYTES: usize = 256 << 10;

/// The elements of a tensor as `kind`, row-major, in host memory: the tensor's own if it is there in
/// this kind already.
pub fn bytes_of(tensor: &Tensor, kind: Kind) -> Bytes {
    let tensor = tensor.to_kind(kind).to_device(Device::Cpu).contiguous();
    let memory = TensorMemory { n_bytes: tensor.numel() * kind.elt_size_in_bytes(), tensor };
    // A few rows of a large tensor must not keep all of it.
    if memory.storage_bytes().is_none_or(|bytes| bytes / 2 > memory.n_bytes) {
        return Bytes::copy_from_slice(memory.as_ref());
    }
    Bytes::from_owner(memory)
}

/// The elements of a tensor as f32, row-major, in host memory, copied only if they are not there.
pub fn floats_of(tensor: &Tensor) -> impl AsRef<[f32]> + use<> {
    let tensor = tensor.to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
    TensorMemory { n_bytes: 4 * tensor.numel(), tensor }
}

/// A tensor on the CPU over bytes. Of f32, bf16 and f16 elements it is no copy if they are many and
/// aligned as their elements are; bytes lie anywhere in a message. Panics if their number is not that
/// of the shape, or if there is no memory for a copy.
pub fn tensor_over(bytes: Bytes, shape: &[i64], kind: Kind) -> Tensor {
    f_tensor_over(bytes, shape, kind).unwrap_or_else(|error| panic!("{error}"))
}

/// As [`tensor_over`]; an error if there is no memory for a copy.
pub(crate) fn f_tensor_over(bytes: Bytes, shape: &[i64], kind: Kind) -> Result<Tensor, TchError> {
    let (size, n_elements) = (kind.elt_size_in_bytes(), shape.iter().product::<i64>());
    assert_eq!(bytes.len(), n_elements as usize * size, "bytes of a tensor of shape {shape:?}");
    let is_aligned = bytes.as_ptr().addr().is_multiple_of(size);
    if bytes.len() >= SHARED_FROM_BYTES
        && is_aligned
        && let Some(tensor) = share(bytes.clone(), shape, kind)
    {
        return Ok(tensor);
    }
    Tensor::f_from_data_size(&bytes, shape, kind)
}

/// A tensor of these values on the CPU, without a copy.
pub fn tensor_of(values: Vec<f32>, shape: &[i64]) -> Tensor {
    tensor_over(Bytes::from_owner(Floats(values)), shape, Kind::Float)
}

/// A contiguous tensor on the CPU whose elements are `n_bytes` bytes.
struct TensorMemory {
    tensor: Tensor,
    n_bytes: usize,
}

impl TensorMemory {
    /// Of the tensor and of all others that are views of the same memory.
    fn storage_bytes(&self) -> Option<usize> {
        let mut bytes = 0;
        // SAFETY: both are a pointer to the same C++ class, `at::Tensor`; it is only read.
        let code = unsafe { torch::aoti_torch_get_storage_size(self.tensor.as_ptr(), &mut bytes) };
        (code == 0).then_some(bytes as usize)
    }

    fn start<T>(&self) -> *const T {
        // Not defined for a tensor without elements.
        let pointer = self.tensor.data_ptr() as *const T;
        if pointer.is_null() { std::ptr::dangling() } else { pointer }
    }
}

impl AsRef<[u8]> for TensorMemory {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: a contiguous tensor on the CPU has all its elements behind its pointer, and keeps
        // them as long as it lives.
        unsafe { std::slice::from_raw_parts(self.start(), self.n_bytes) }
    }
}

impl AsRef<[f32]> for TensorMemory {
    fn as_ref(&self) -> &[f32] {
        // SAFETY: as above; made by `floats_of` alone, of f32 elements that libtorch has aligned.
        unsafe { std::slice::from_raw_parts(self.start(), self.n_bytes / 4) }
    }
}

struct Floats(Vec<f32>);

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: every f32 is four bytes without gaps.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), 4 * self.0.len()) }
    }
}

/// None if libtorch refuses, or for another kind.
fn share(bytes: Bytes, shape: &[i64], kind: Kind) -> Option<Tensor> {
    // SAFETY: they take nothing and return a constant.
    let (f32, bf16, f16, device, layout) = unsafe {
        (
            torch::aoti_torch_dtype_float32(),
            torch::aoti_torch_dtype_bfloat16(),
            torch::aoti_torch_dtype_float16(),
            torch::aoti_torch_device_type_cpu(),
            torch::aoti_torch_layout_strided(),
        )
    };
    let dtype = match kind {
        Kind::Float => f32,
        Kind::BFloat16 => bf16,
        Kind::Half => f16,
        _ => return None,
    };
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    extern "C" fn drop_owner(_: *mut c_void, owner: *mut c_void) {
        // SAFETY: this is the box that was given away below; libtorch calls this once.
        drop(unsafe { Box::from_raw(owner.cast::<Bytes>()) });
    }
    let data = bytes.as_ptr().cast_mut().cast();
    let owner = Box::into_raw(Box::new(bytes));
    let mut tensor = std::ptr::null_mut();
    // SAFETY: the bytes are as many as the shape says and aligned (the caller has checked both), and
    // live in `owner` until libtorch calls `drop_owner`, when the last view of the tensor is gone. They
    // are never written to (the module's text). The handle is a new `at::Tensor *`, which is what tch
    // holds and deletes.
    unsafe {
        let code = torch::torch_from_blob(
            data,
            shape.len() as i64,
            shape.as_ptr(),
            strides.as_ptr(),
            0,
            dtype,
            device,
            -1,
            &mut tensor,
            layout,
            std::ptr::null(),
            0,
            drop_owner,
            owner.cast(),
        );
        // After a failure nobody knows whether the owner was dropped: better lost than dropped twice.
        (code == 0).then(|| Tensor::from_ptr(tensor))
    }
}

/// A file's bytes, mapped read-only.
#[derive(Clone)]
pub(crate) struct FileMap(std::sync::Arc<Mmap>);

impl FileMap {
    /// Model files are not written to in place while they are open here: every tool that fetches or
    /// saves them renames a finished file. Who truncates one all the same ends this process with
    /// SIGBUS, as with every reader of mapped weights.
    pub fn open(file: &File) -> io::Result<FileMap> {
        // SAFETY: as said above, nobody changes what is mapped; and nothing here trusts the content,
        // which is checked as bytes and copied before it is a value.
        let map = unsafe { Mmap::map(file) }?;
        Ok(FileMap(std::sync::Arc::new(map)))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A part of them that keeps the file mapped.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        Bytes::from_owner(self.clone()).slice(range)
    }

    /// Lets the system take the pages of a range back. They are read again when they are needed.
    pub fn release(&self, range: Range<usize>) -> io::Result<()> {
        // SAFETY: the map is read-only and backed by a file: a page that is dropped is read again
        // from the file, with the same content, when somebody touches it.
        unsafe {
            self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        }
    }
}

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

/// Sets a number of the C library's allocator. Whether it took it.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn set_allocator(option: i32, value: i32) -> bool {
    // SAFETY: sets one number inside the allocator, under its own lock; it refuses what it does not
    // know.
    unsafe { libc::mallopt(option, value) == 1 }
}

/// Gives the allocator's free memory back to the system.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn trim_allocator() {
    // SAFETY: works on the allocator's free lists, under its own lock.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What the allocator has handed out and not got back, in all arenas and mappings.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn allocated_bytes() -> usize {
    // SAFETY: takes nothing and returns counters by value.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

/// Loads the part of libtorch that knows CUDA, which is found as every library is (LD_LIBRARY_PATH).
/// Programs are linked against the CPU part only, so that one binary serves both; call this before
/// anything else that uses libtorch. An error is the loader's text.
pub fn load_cuda() -> Result<(), String> {
    const LIBRARY: &CStr = c"libtorch_cuda.so";
    // SAFETY: the name is a C string; libtorch_cuda's initialisers register operators and do nothing
    // else. Whoever puts another library under this name on the path runs their code in this process,
    // as with every library that it is linked against.
    let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !library.is_null() {
        return Ok(());
    }
    // SAFETY: takes nothing; what it returns is null or a C string that stays until this thread's next
    // dl* call.
    let message = unsafe {
        let message = libc::dlerror();
        (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
    };
    Err(message.unwrap_or_else(|| "no reason given".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn bytes_of_a_tensor_are_its_own_and_outlive_it() {
        let tensor = Tensor::from_slice(&[1.0f32, -2.0, 3.0, 4.5]).view([2, 2]);
        let address = tensor.data_ptr().addr();
        let bytes = bytes_of(&tensor, Kind::Float);
        assert_eq!(bytes.as_ptr().addr(), address);
        drop(tensor);
        let values = std::thread::spawn(move || Vec::from(bytes)).join().unwrap();
        assert_eq!(values, [1.0f32, -2.0, 3.0, 4.5].map(f32::to_le_bytes).concat());
    }

    #[test]
    fn a_view_of_much_more_is_copied_and_other_orders_are_put_right() {
        let tensor = Tensor::arange(1000, (Kind::Float, Device::Cpu)).view([100, 10]);
        let rows = bytes_of(&tensor.narrow(0, 50, 2), Kind::Float);
        assert_ne!(rows.as_ptr().addr(), tensor.narrow(0, 50, 2).data_ptr().addr());
        assert_eq!(rows[..4], 500f32.to_le_bytes());
        let most = tensor.narrow(0, 1, 99);
        assert_eq!(bytes_of(&most, Kind::Float).as_ptr().addr(), most.data_ptr().addr());
        let columns = floats_of(&tensor.tr());
        assert_eq!(columns.as_ref()[..3], [0.0, 10.0, 20.0]);
        assert!(bytes_of(&tensor.narrow(0, 0, 0), Kind::BFloat16).is_empty());
        assert!(floats_of(&tensor.narrow(0, 0, 0)).as_ref().is_empty());
    }

    #[test]
    fn a_tensor_over_bytes_keeps_them_until_its_last_view_is_gone() {
        struct Watched(Vec<u8>, #[allow(dead_code)] Arc<()>);
        impl AsRef<[u8]> for Watched {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let (values, alive) = ((0..100_000).map(|i| i as f32), Arc::new(()));
        let memory = values.flat_map(f32::to_le_bytes).collect();
        let bytes = Bytes::from_owner(Watched(memory, alive.clone()));
        let tensor = tensor_over(bytes.clone(), &[25_000, 4], Kind::Float);
        assert_eq!(tensor.data_ptr().addr(), bytes.as_ptr().addr());
        assert_eq!((tensor.size(), tensor.device()), (vec![25_000, 4], Device::Cpu));
        let row = tensor.get(2);
        drop((tensor, bytes));
        assert_eq!(Arc::strong_count(&alive), 2);
        assert_eq!(Vec::<f32>::try_from(&row).unwrap(), [8.0, 9.0, 10.0, 11.0]);
        drop(row);
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn bytes_that_are_not_aligned_are_copied() {
        let memory: Vec<u8> = (0..400_004u32).map(|i| i as u8).collect();
        let bytes = Bytes::from(memory);
        for start in 0..4 {
            let bytes = bytes.slice(start..start + 400_000);
            for (kind, size) in [(Kind::Float, 4), (Kind::BFloat16, 2)] {
                let tensor = tensor_over(bytes.clone(), &[100, 4000 / size as i64], kind);
                let shared = tensor.data_ptr().addr() == bytes.as_ptr().addr();
                assert_eq!(shared, bytes.as_ptr().addr().is_multiple_of(size));
                assert_eq!(bytes_of(&tensor, kind), bytes);
            }
        }
        // Few bytes keep nothing.
        let short = bytes.slice(..36);
        let tensor = tensor_over(short.clone(), &[9], Kind::Float);
        assert_ne!(tensor.data_ptr().addr(), short.as_ptr().addr());
        assert_eq!(bytes_of(&tensor, Kind::Float), short);
        assert_eq!(tensor_over(Bytes::new(), &[0, 3], Kind::Float).size(), [0, 3]);
        let tensor = tensor_of(vec![1.5, 2.5], &[1, 2]);
        assert_eq!(Vec::<f32>::try_from(tensor.view(-1)).unwrap(), [1.5, 2.5]);
    }
}
