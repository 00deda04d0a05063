package keyring

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshca/meshca/ca/keyfile"
)

// version is that of the files.
const version = 1

// record is the file of one root.
type record struct {
	Version int    `json:"version"`
	Root    string `json:"root"`
	// Kept is the intermediate's key, Chain its certificates in PEM.
	Kept     *entry    `json:"kept,omitempty"`
	Chain    string    `json:"chain,omitempty"`
	Received time.Time `json:"received,omitzero"`
	// Others are keys in the token that are to be destroyed, or have no certificate yet.
	Others []entry `json:"others,omitempty"`
}

// entry is a key: itself in PKCS #8, or its name in a token.
type entry struct {
	PEM string `json:"pem,omitempty"`
	URI string `json:"uri,omitempty"`
}

func (r *record) forget() {
	if r.Kept != nil && r.Kept.PEM == "" {
		r.Others = append(r.Others, *r.Kept)
	}
	r.Kept, r.Chain, r.Received = nil, "", time.Time{}
}

func (r *record) empty() bool { return r.Kept == nil && len(r.Others) == 0 }

func path(dir, root string) string { return filepath.Join(dir, root+".json") }

// isRoot keeps what becomes a file's name to what ca.RootID makes.
func isRoot(root string) bool {
	b, err := hex.DecodeString(root)
	return err == nil && len(b) == 32 && strings.ToLower(root) == root
}

func (r *record) write(dir string) error {
	if r.empty() {
		return keyfile.Remove(path(dir, r.Root))
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	defer clear(data)
	return keyfile.Replace(path(dir, r.Root), data)
}

// readAll reads the files of a directory, by root.
func readAll(dir string) (map[string]*record, error) {
	files, err := filepath.Glob(filepath.Join(keyfile.Literal(dir), "*.json"))
	if err != nil {
		return nil, err
	}
	all := map[string]*record{}
	for _, file := range files {
		r, err := read(file)
		if err != nil {
			return nil, err
		}
		all[r.Root] = r
	}
	return all, nil
}

func read(file string) (*record, error) {
	data, err := keyfile.ReadOwn(file)
	if err != nil {
		return nil, fmt.Errorf("%w. If others may have read the key in it, delete it: the CA then takes a new intermediate", err)
	}
	defer clear(data)
	var r record
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	// The decoder's words would repeat content.
	if err := dec.Decode(&r); err != nil || !isRoot(r.Root) || path(filepath.Dir(file), r.Root) != file || r.Kept != nil && r.Chain == "" {
		return nil, fmt.Errorf("%s is damaged. Delete it: the CA then takes a new intermediate; keys that it names in a PKCS #11 token stay there", file)
	}
	if r.Version != version {
		return nil, fmt.Errorf("%s has version %d, and this program reads %d: run the one that wrote it, or delete it", file, r.Version, version)
	}
	return &r, nil
}

func exists(dir string) (bool, error) {
	_, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func encodeKey(k *ecdsa.PrivateKey) (string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return "", err
	}
	defer clear(der)
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), nil
}

func decodeKey(text string) (crypto.Signer, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("the key is not PEM")
	}
	defer clear(block.Bytes)
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("the key is not PKCS #8")
	}
	signer, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("the key is not ECDSA")
	}
	return signer, nil
}

func encodeChain(chain []*x509.Certificate) string {
	var b strings.Builder
	for _, c := range chain {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.String()
}

func decodeChain(text string) (chain []*x509.Certificate, err error) {
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("the kept chain: %w", err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, errors.New("the kept chain is empty")
	}
	return chain, nil
}
