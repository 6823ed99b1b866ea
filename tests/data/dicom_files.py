"""Writes one DICOM image, any element of which may be replaced, added, or left out with None."""

from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def write_dicom(path, pixels, *, photometric="MONOCHROME2", bits=None, **elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    record = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    record.SOPClassUID, record.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    record.Rows, record.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    record.SamplesPerPixel = 3 if colour else 1
    if colour:
        record.PlanarConfiguration = 0
    record.PhotometricInterpretation = photometric
    record.BitsAllocated = pixels.dtype.itemsize * 8
    record.BitsStored = bits or record.BitsAllocated
    record.HighBit = record.BitsStored - 1
    record.PixelRepresentation = int(pixels.dtype.kind == "i")
    record.PixelData = pixels.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(record, name)
        else:
            setattr(record, name, value)
    record.save_as(path, enforce_file_format=True)
    return path
