//go:build cgo

package pkcs11

import (
	"context"
	"crypto"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/pkcs11"
	"go.step.sm/crypto/kms/uri"
)

// Supported says that this build can load PKCS #11 modules.
const Supported = true

// token is a device by go.step.sm/crypto/kms.
type token struct{ kms *pkcs11.PKCS11 }

var _ device = token{}

func openDevice(u URI, pin string) (device, error) {
	values := url.Values{"module-path": {u.Module}}
	for name, value := range map[string]string{"token": u.Token, "serial": u.Serial, "slot-id": u.SlotID} {
		if value != "" {
			values.Set(name, value)
		}
	}
	kms, err := pkcs11.New(context.Background(), apiv1.Options{Type: apiv1.PKCS11, URI: uri.New(pkcs11.Scheme, values).String(), Pin: pin})
	if err != nil {
		// The library's words hold a code and no PIN: CKR_PIN_INCORRECT, CKR_PIN_LOCKED (PKCS #11 §5.6).
		if strings.Contains(err.Error(), "CKR_PIN_") {
			return nil, fmt.Errorf("%w: %w", errPIN, err)
		}
		return nil, err
	}
	return token{kms}, nil
}

// name is a key as the library names it.
func name(object, id string) string {
	values := url.Values{}
	if object != "" {
		values.Set("object", object)
	}
	if id != "" {
		values.Set("id", "0x"+hex.EncodeToString([]byte(id)))
	}
	return uri.New(pkcs11.Scheme, values).String()
}

func (t token) find(object, id string) (crypto.Signer, error) {
	k, err := t.kms.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: name(object, id)})
	if err != nil && strings.HasSuffix(err.Error(), " not found") { // it has no sentinel for it
		return nil, errNoKey
	}
	return k, err
}

func (t token) make(object, id string) (crypto.Signer, error) {
	// Extractable is false where it is not asked for.
	if _, err := t.kms.CreateKey(&apiv1.CreateKeyRequest{Name: name(object, id), SignatureAlgorithm: apiv1.ECDSAWithSHA256}); err != nil {
		return nil, err
	}
	return t.find(object, id)
}

func (t token) destroy(object, id string) error { return t.kms.DeleteKey(name(object, id)) }

func (t token) close() error { return t.kms.Close() }
