package kubernetes

import (
	"errors"
	"fmt"
	"net/url"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/attestor"
)

// Mode is how a cluster's tokens are proven.
type Mode string

const (
	// TokenReview asks the API server about each token.
	TokenReview Mode = "tokenReview"
	// JWKS verifies signatures here, under the cluster's published keys.
	JWKS Mode = "jwks"
)

// Liveness is how it is known that what a token stands for still lives.
type Liveness string

const (
	// LivenessAPI asks the API server, or watches it (mode jwks).
	LivenessAPI Liveness = "api"
	// LivenessNone cannot know: a token is good until it expires, whatever became of its pod.
	LivenessNone Liveness = "none"
)

// Config is one cluster's entry in the CA's configuration file.
type Config struct {
	// Name is what agents call the cluster, and a part of their SPIFFE IDs: an RFC 1123 label. Required.
	Name string `json:"name"`

	// Mode is `tokenReview` (default: the API server is asked about each token, so it must be reachable) or `jwks`
	// (signatures are verified here, so tokens of known pods are still good while the API server is away).
	Mode Mode `json:"mode,omitempty"`

	// Kubeconfig is the path of the file that says how to reach the API server and as whom. Empty: as the pod that the CA
	// runs in. It is read again when it changes. The account needs: create tokenreviews; get, list and watch pods, nodes,
	// serviceaccounts, namespaces. The watches tell the CA at once what ends (and in mode jwks what lives); they take some
	// hundred bytes of memory a pod.
	Kubeconfig string `json:"kubeconfig,omitempty"`

	// Issuer is the `iss` that tokens must carry, to the letter. Mode jwks with keys from the API server can leave it
	// empty: the API server's discovery document says it. Mode tokenReview leaves it to the API server where empty.
	Issuer string `json:"issuer,omitempty"`

	// Keys says where mode jwks has the cluster's token keys from. Empty: from the API server (/openid/v1/jwks).
	Keys KeysConfig `json:"jwks,omitzero"`

	// Liveness is `api` (default) or, in mode jwks alone, `none`: nobody is asked whether pod, node, service account
	// and namespace still live. Tokens must then name their node themselves (API servers of 1.32 and later do that), and what
	// was issued outlives its pod until its own time is over.
	Liveness Liveness `json:"liveness,omitempty"`

	// MaxTokenAge is how long after its issue (`iat`) a token is still accepted. Default 25h: kubelets replace tokens
	// before they are 24h old.
	MaxTokenAge metav1.Duration `json:"maxTokenAge,omitzero"`

	// MaxStale is how long a watch may be silent before (in mode jwks) nothing is attested any more. Default 10m, at least
	// 1m. A quiet cluster's watch is not silent: the API server sends bookmarks, and watches are opened anew.
	MaxStale metav1.Duration `json:"maxStale,omitzero"`

	// MaxCalls is how many calls to the API server may be under way at once. Default 64, at least 2, at most 1024. A
	// quarter of them, or one, is the most that callers get who attest themselves as agents: anybody can ask for that.
	MaxCalls int `json:"maxCalls,omitempty"`

	// CallTimeout bounds each call to the API server and to the source of keys. Default 5s, at most 1m.
	CallTimeout metav1.Duration `json:"callTimeout,omitzero"`
}

// KeysConfig names a source of token keys other than the API server: a URL or a file, not both.
type KeysConfig struct {
	// URL of a JSON Web Key Set, https.
	URL string `json:"url,omitempty"`
	// CAFile holds PEM certificates that the URL's server is verified with. It is read again when it changes. Empty: the
	// system's.
	CAFile string `json:"caFile,omitempty"`
	// File holds a JSON Web Key Set. It is read again when it changes.
	File string `json:"file,omitempty"`
}

// settings is a Config that was found sound, with its defaults in place.
type settings struct {
	name                               string
	mode                               Mode
	kubeconfig                         string
	issuer                             string
	keys                               KeysConfig
	live                               bool
	maxTokenAge, maxStale, callTimeout time.Duration
	maxCalls                           int
}

// Validate says all that is wrong with the entry. It opens no file and calls nobody.
func (c Config) Validate() error {
	_, err := c.parse()
	return err
}

func (c Config) parse() (settings, error) {
	s := settings{
		name: c.Name, mode: c.Mode, kubeconfig: c.Kubeconfig, issuer: c.Issuer, keys: c.Keys, live: true,
		maxTokenAge: c.MaxTokenAge.Duration, maxStale: c.MaxStale.Duration, callTimeout: c.CallTimeout.Duration,
		maxCalls: c.MaxCalls,
	}
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }

	if _, err := attestor.NewIdentity(c.Name, "n", "a"); err != nil {
		fault("name: %w: use lower-case letters, digits and dashes, at most 63", err)
	}
	switch c.Mode {
	case "":
		s.mode = TokenReview
	case TokenReview, JWKS:
	default:
		fault("mode: %q is neither %s nor %s", c.Mode, TokenReview, JWKS)
	}
	switch c.Liveness {
	case "", LivenessAPI:
	case LivenessNone:
		s.live = false
		if s.mode != JWKS {
			fault("liveness: none goes with mode jwks alone: a TokenReview needs the API server anyway")
		}
	default:
		fault("liveness: %q is neither %s nor %s", c.Liveness, LivenessAPI, LivenessNone)
	}
	if err := c.checkKeys(s.mode); err != nil {
		faults = append(faults, err)
	}
	bounded := func(key string, d *time.Duration, preset, least, most time.Duration) {
		switch {
		case *d == 0:
			*d = preset
		case *d < least || *d > most:
			fault("%s: %v is not between %v and %v", key, *d, least, most)
		}
	}
	bounded("maxTokenAge", &s.maxTokenAge, 25*time.Hour, time.Minute, 366*24*time.Hour)
	bounded("maxStale", &s.maxStale, 10*time.Minute, time.Minute, 24*time.Hour)
	bounded("callTimeout", &s.callTimeout, 5*time.Second, 100*time.Millisecond, time.Minute)
	switch {
	case c.MaxCalls == 0:
		s.maxCalls = 64
	case c.MaxCalls < 2 || c.MaxCalls > 1024:
		fault("maxCalls: %d is not between 2 and 1024", c.MaxCalls)
	}
	return s, errors.Join(faults...)
}

func (c Config) checkKeys(mode Mode) error {
	k := c.Keys
	switch {
	case k == KeysConfig{}:
		return nil
	case mode != JWKS:
		return errors.New("jwks: goes with mode jwks alone; leave it out, or set the mode")
	case k.URL != "" && k.File != "":
		return errors.New("jwks: both url and file are set; keep one")
	case k.URL == "" && k.File == "":
		return errors.New("jwks: caFile goes with url")
	case k.CAFile != "" && k.File != "":
		return errors.New("jwks: caFile goes with url, not with file")
	case c.Issuer == "":
		return errors.New("issuer: required where keys come from a URL or a file: nothing else says whose tokens they verify")
	case k.File != "":
		return nil
	}
	u, err := url.Parse(k.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
		return errors.New("jwks: url must be https://host/path, without user or fragment: what it answers decides whom the CA believes")
	}
	return nil
}

// needsAPI tells whether the API server is called at all.
func (s settings) needsAPI() bool { return s.live || s.keys == KeysConfig{} }
