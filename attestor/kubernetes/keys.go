package kubernetes

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	jose "github.com/go-jose/go-jose/v4"
)

const (
	// maxKeySet is how many bytes of a key set are read, maxKeys how many of its keys.
	maxKeySet = 1 << 20
	maxKeys   = 128
)

// keySet is a cluster's token keys as they were read; it does not change.
type keySet struct {
	byID map[string]crypto.PublicKey
	// issuer is what the source says of it; empty where it says nothing.
	issuer string
	// readAt is when the reading began: a key that was published before is in it.
	readAt time.Time
	// skipped says of each key that is not used why.
	skipped []string
}

func (s *keySet) ids() []string { return slices.Sorted(maps.Keys(s.byID)) }

// parseKeys reads a JSON Web Key Set (RFC 7517 §5). A key that cannot verify service-account tokens is skipped, as is the
// second of two with one id; a set without any usable key is an error.
func parseKeys(raw []byte) (*keySet, error) {
	var doc struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if len(raw) > maxKeySet {
		return nil, fmt.Errorf("the key set is larger than %d bytes", maxKeySet)
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, errors.New("this is no JSON Web Key Set")
	}
	if len(doc.Keys) > maxKeys {
		return nil, fmt.Errorf("the key set holds %d keys, at most %d are read", len(doc.Keys), maxKeys)
	}
	set := &keySet{byID: make(map[string]crypto.PublicKey, len(doc.Keys))}
	for i, one := range doc.Keys {
		var jwk jose.JSONWebKey
		err := jwk.UnmarshalJSON(one)
		if err == nil {
			err = usable(&jwk)
		}
		if _, twice := set.byID[jwk.KeyID]; err == nil && twice {
			err = errors.New("another key has the same id")
		}
		if err != nil {
			set.skipped = append(set.skipped, fmt.Sprintf("key %d (%s): %v", i+1, quoted(jwk.KeyID), err))
			continue
		}
		set.byID[jwk.KeyID] = jwk.Key
	}
	if len(set.byID) == 0 {
		return nil, fmt.Errorf("none of the %d keys of the key set can verify tokens %v", len(doc.Keys), set.skipped)
	}
	return set, nil
}

func usable(jwk *jose.JSONWebKey) error {
	if jwk.KeyID == "" {
		return errors.New("it has no id")
	}
	if jwk.Use != "" && jwk.Use != "sig" {
		return fmt.Errorf("it is for %s, not for signatures", quoted(jwk.Use))
	}
	var made algorithm
	if jwk.Algorithm != "" {
		a, ok := algorithmOf(jwk.Algorithm)
		if !ok {
			return fmt.Errorf("its algorithm %s is not accepted", quoted(jwk.Algorithm))
		}
		made = a
	}
	switch key := jwk.Key.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 || bits > 8192 {
			return fmt.Errorf("an RSA key of %d bits is not accepted", bits)
		}
		if key.E < 3 || key.E%2 == 0 {
			return errors.New("its exponent is not one of RSA")
		}
		if made.curve != nil {
			return errors.New("its algorithm is not one of its type")
		}
		return nil
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
		default:
			return errors.New("its curve is not accepted")
		}
		if jwk.Algorithm != "" && made.curve != key.Curve {
			return errors.New("its algorithm is not one of its curve")
		}
		return nil
	case *rsa.PrivateKey, *ecdsa.PrivateKey:
		return errors.New("it is a private key, which has no business in a key set")
	}
	return errors.New("its type is not accepted")
}
