package pkcs11

import "errors"

// CheckBuild says what to do when this build has no PKCS #11; nil when it has.
func CheckBuild() error {
	if Supported {
		return nil
	}
	return errors.New("this meshca cannot use PKCS #11: it is the static build, and a token's module is a shared library, which " +
		"only a build with cgo can load. Take the binary meshca-pkcs11 in its place (`make build-pkcs11` makes it); it reads the same configuration")
}
