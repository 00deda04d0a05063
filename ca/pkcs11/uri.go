package pkcs11

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

// maxURI bounds a URI, in bytes.
const maxURI = 4096

// URI names a token, how it is reached, and maybe a key in it (RFC 7512).
type URI struct {
	// Module is the absolute path of the token's PKCS #11 library (module-path).
	Module string
	// PinSource is the file that holds the user's PIN (pin-source).
	PinSource string
	// One of Token (its label), Serial and SlotID names the token.
	Token, Serial, SlotID string
	// Object is the key's label (CKA_LABEL), ID its CKA_ID; either may be empty.
	Object, ID string
}

// IsURI reports whether s is meant as a PKCS #11 URI and not as a path.
func IsURI(s string) bool { return len(s) >= len(scheme) && strings.EqualFold(s[:len(scheme)], scheme) }

const scheme = "pkcs11:"

// Parse reads a URI that names a token, its module and the file with its PIN. It refuses what it would not heed: an
// attribute passed over could mean another token than the one that was named.
func Parse(s string) (URI, error) {
	if !IsURI(s) {
		return URI{}, errors.New("a PKCS #11 URI begins with pkcs11: (RFC 7512)")
	}
	if len(s) > maxURI {
		return URI{}, fmt.Errorf("the URI has %d bytes, at most %d are read", len(s), maxURI)
	}
	path, query, _ := strings.Cut(s[len(scheme):], "?")
	var u URI
	// The values never stand in an error: a PIN could be among them.
	if err := attributes(path, ";", u.pathAttribute); err != nil {
		return URI{}, err
	}
	if err := attributes(query, "&", u.queryAttribute); err != nil {
		return URI{}, err
	}
	return u, u.check()
}

// attributes hands on each name and its value, which occur once.
func attributes(s, separator string, take func(name string) (*string, error)) error {
	if s == "" {
		return nil
	}
	seen := map[string]bool{}
	for _, pair := range strings.Split(s, separator) {
		name, encoded, found := strings.Cut(pair, "=")
		if !found {
			return fmt.Errorf("an attribute of the URI has no value: it is made of name=value, separated by %q", separator)
		}
		into, err := take(name)
		if err != nil {
			return err
		}
		value, err := url.PathUnescape(encoded)
		if err != nil || strings.ContainsRune(value, 0) {
			return fmt.Errorf("the value of %s is not percent-encoded as RFC 7512 §2.3 has it", name)
		}
		if value == "" || seen[name] {
			return fmt.Errorf("%s is empty or named twice", name)
		}
		seen[name], *into = true, value
	}
	return nil
}

func (u *URI) pathAttribute(name string) (*string, error) {
	switch name {
	case "token":
		return &u.Token, nil
	case "serial":
		return &u.Serial, nil
	case "slot-id":
		return &u.SlotID, nil
	case "object":
		return &u.Object, nil
	case "id":
		return &u.ID, nil
	case "module-path", "pin-source":
		return nil, fmt.Errorf("%s stands behind the question mark (RFC 7512 §2.4): pkcs11:token=…?%s=…", name, name)
	case "pin-value":
		return nil, errPinValue
	}
	return nil, fmt.Errorf("the attribute %.32q is not read: a key is named by token, serial or slot-id, and object and id", name)
}

func (u *URI) queryAttribute(name string) (*string, error) {
	switch name {
	case "module-path":
		return &u.Module, nil
	case "pin-source":
		return &u.PinSource, nil
	case "pin-value":
		return nil, errPinValue
	}
	return nil, fmt.Errorf("the attribute %.32q is not read: behind the question mark stand module-path and pin-source", name)
}

var errPinValue = errors.New("pin-value: a PIN in the configuration would be read by everyone who reads that. " +
	"Write it to a file with mode 0600 and name that: pin-source=/path/to/pin")

func (u *URI) check() error {
	named := 0
	for _, by := range []string{u.Token, u.Serial, u.SlotID} {
		if by != "" {
			named++
		}
	}
	if named != 1 {
		return errors.New("the URI must name its token by exactly one of token (its label), serial and slot-id")
	}
	if u.SlotID != "" {
		if _, err := strconv.ParseUint(u.SlotID, 10, 31); err != nil {
			return errors.New("slot-id is a decimal number")
		}
	}
	switch {
	case u.Module == "":
		return errors.New("the URI does not say which library to load: ?module-path=/usr/lib/softhsm/libsofthsm2.so, for one")
	case !filepath.IsAbs(u.Module):
		return errors.New("module-path must be absolute: which library is loaded is not for a search path to say")
	case u.PinSource == "":
		return errors.New("the URI does not say where its PIN is: &pin-source=/path/to/pin, a file with mode 0600")
	}
	path, ok := strings.CutPrefix(u.PinSource, "file:")
	if ok && strings.HasPrefix(path, "//") {
		path = "/" + strings.TrimLeft(path, "/")
	}
	if path == "" || strings.HasPrefix(path, "|") || strings.Contains(path, "://") {
		return errors.New("pin-source must name a file; nothing is run or fetched to get a PIN")
	}
	u.PinSource = path
	return nil
}

// WithKey is another key in the same token.
func (u URI) WithKey(object, id string) URI {
	u.Object, u.ID = object, id
	return u
}

// Resolve reads what String made, of a key in the same token.
func (u URI) Resolve(name string) (URI, error) {
	var k URI
	path, ok := strings.CutPrefix(name, scheme)
	if !ok || len(name) > maxURI {
		return URI{}, errors.New("no name of a key in a PKCS #11 token")
	}
	if err := attributes(path, ";", k.pathAttribute); err != nil {
		return URI{}, err
	}
	if k.TokenName() != u.TokenName() || u == (URI{}) {
		return URI{}, fmt.Errorf("the key %s is in another PKCS #11 token than the configuration names", name)
	}
	return u.WithKey(k.Object, k.ID), nil
}

// TokenName is the token alone, for people and records.
func (u URI) TokenName() string {
	switch {
	case u.Token != "":
		return scheme + "token=" + escape(u.Token)
	case u.Serial != "":
		return scheme + "serial=" + escape(u.Serial)
	}
	return scheme + "slot-id=" + u.SlotID
}

// String is the token and the key, without how they are reached.
func (u URI) String() string {
	s := u.TokenName()
	if u.Object != "" {
		s += ";object=" + escape(u.Object)
	}
	if u.ID != "" {
		s += ";id=" + escape(u.ID)
	}
	return s
}

// Full is all of it, as Parse reads it.
func (u URI) Full() string {
	return u.String() + "?module-path=" + escape(u.Module) + "&pin-source=" + escape(u.PinSource)
}

// escape leaves nothing that separates (RFC 7512 §2.3).
func escape(s string) string {
	return strings.NewReplacer(";", "%3B", "&", "%26").Replace(url.PathEscape(s))
}
