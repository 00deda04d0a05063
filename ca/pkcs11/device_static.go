//go:build !cgo

package pkcs11

// Supported says that this build can load PKCS #11 modules.
const Supported = false

func openDevice(URI, string) (device, error) { return nil, CheckBuild() }
