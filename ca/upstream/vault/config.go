package vault

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Config is the `upstream.vault` piece of the CA's configuration file.
type Config struct {
	// Address is Vault's, such as "https://vault.example:8200". Plain http is for an address on loopback alone: tokens
	// travel over it. Required.
	Address string `json:"address"`
	// Namespace is Vault Enterprise's, such as "mesh/prod"; empty for the root namespace.
	Namespace string `json:"namespace,omitempty"`
	// Mount is the path of the PKI secrets engine. Default "pki".
	Mount string `json:"mount,omitempty"`
	// Issuer is the one that signs from the first start on: its issuer_id, or its name in the mount. A name is looked up
	// once; what counts from then on is the issuer_id, for a name can be given to another key. "default" is refused: that
	// is whatever the mount's administrator last made it. Required.
	Issuer string `json:"issuer"`
	// CAFile holds PEM certificates that Vault's own TLS certificate is verified with. It is read again at each login.
	// Default: the system's.
	CAFile string `json:"caFile,omitempty"`
	// Auth is how we log in. Exactly one kind.
	Auth AuthConfig `json:"auth"`
	// RootFile holds the self-signed end of the issuer's chain, PEM, where the mount does not: an issuer whose own root is
	// elsewhere. Several certificates may stand in it. What is trusted is never guessed: without it such an issuer is
	// refused.
	RootFile string `json:"rootFile,omitempty"`
	// Timeout bounds each call to Vault. Default 30s, at most 2m.
	Timeout metav1.Duration `json:"timeout,omitzero"`
	// AutoTrust takes each root into the trust bundle that appears in the mount and could sign: its chain is whole, it has a
	// key, and lasts longer than an intermediate would. From then on every proxy accepts what it signs; for this CA it signs
	// nothing before `certctl ca rotate root --issuer` says so. Whoever may add issuers to the mount then decides whom the
	// mesh trusts: it is for mounts that nobody else administers. A root that was tainted, removed or replaced is never taken
	// in again. Default: false, they are listed as candidates.
	AutoTrust bool `json:"autoTrust,omitempty"`
	// Poll is how often the issuers are looked at. Default 1m, at least 5s.
	Poll metav1.Duration `json:"poll,omitzero"`
}

// AuthConfig names how we log in: exactly one of its fields. Every file in it is read again at each login.
type AuthConfig struct {
	// TokenFile holds a Vault token, such as the sink of a Vault Agent. A change of the file is taken up within Poll.
	TokenFile string `json:"tokenFile,omitempty"`
	// AppRole logs in with a role id and a secret id.
	AppRole *AppRoleConfig `json:"appRole,omitempty"`
	// Kubernetes logs in with the service-account token of the pod that we run in.
	Kubernetes *KubernetesConfig `json:"kubernetes,omitempty"`
	// Cert logs in with a TLS client certificate.
	Cert *CertConfig `json:"cert,omitempty"`
}

// AppRoleConfig logs in by AppRole.
type AppRoleConfig struct {
	// Path is where the auth method is mounted. Default "approle".
	Path string `json:"path,omitempty"`
	// RoleIDFile and SecretIDFile hold the two halves. Required.
	RoleIDFile   string `json:"roleIDFile"`
	SecretIDFile string `json:"secretIDFile"`
}

// KubernetesConfig logs in by Kubernetes auth.
type KubernetesConfig struct {
	// Path is where the auth method is mounted. Default "kubernetes".
	Path string `json:"path,omitempty"`
	// Role is the auth method's role. Required.
	Role string `json:"role"`
	// TokenFile is a projected token, best one with an audience for Vault alone. Default
	// "/var/run/secrets/kubernetes.io/serviceaccount/token".
	TokenFile string `json:"tokenFile,omitempty"`
}

// CertConfig logs in by TLS certificate.
type CertConfig struct {
	// Path is where the auth method is mounted. Default "cert".
	Path string `json:"path,omitempty"`
	// Role is the auth method's certificate role. Empty: Vault takes the one that matches.
	Role string `json:"role,omitempty"`
	// CertFile and KeyFile hold the client certificate, with what leads to its root, and its key, PEM. Required.
	CertFile string `json:"certFile"`
	KeyFile  string `json:"keyFile"`
}

const (
	defaultTimeout, maxTimeout = 30 * time.Second, 2 * time.Minute
	defaultPoll, minPoll       = time.Minute, 5 * time.Second
	podToken                   = "/var/run/secrets/kubernetes.io/serviceaccount/token"
)

// Validate says all that is wrong with the piece. It opens no file and calls nobody.
func (c Config) Validate() error {
	_, err := c.complete()
	return err
}

// complete returns the configuration with its defaults in place.
func (c Config) complete() (Config, error) {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if err := checkAddress(c.Address); err != nil {
		fault("address: %w", err)
	}
	c.Namespace = strings.Trim(c.Namespace, "/")
	if c.Namespace != "" && !pathForm.MatchString(c.Namespace) {
		fault("namespace: %.100q is no path of letters, digits, dots, dashes and underscores", c.Namespace)
	}
	checkPath(&c.Mount, "pki", "mount", fault)
	switch {
	case c.Issuer == "":
		fault("issuer: required: the issuer_id or the name of the issuer that is to sign (`vault list -detailed %s/issuers` shows them)", c.Mount)
	case c.Issuer == "default":
		fault("issuer: the mount's default issuer can be moved to another key at any time: name one by its issuer_id or its name (`vault list -detailed %s/issuers` shows them)", c.Mount)
	case !refForm.MatchString(c.Issuer):
		fault("issuer: %.100q is neither an issuer_id nor a name", c.Issuer)
	}
	if c.Timeout.Duration == 0 {
		c.Timeout.Duration = defaultTimeout
	}
	if c.Poll.Duration == 0 {
		c.Poll.Duration = defaultPoll
	}
	if t := c.Timeout.Duration; t < time.Second || t > maxTimeout {
		fault("timeout: %s does not lie between 1s and %s", t, maxTimeout)
	}
	if p := c.Poll.Duration; p < minPoll {
		fault("poll: %s is less than %s", p, minPoll)
	}
	auth, err := c.Auth.complete()
	if err != nil {
		faults = append(faults, err)
	}
	c.Auth = auth
	return c, errors.Join(faults...)
}

func (a AuthConfig) complete() (AuthConfig, error) {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf("auth."+format, args...)) }
	required := func(value, name string) {
		if value == "" {
			fault("%s: required", name)
		}
	}
	kinds := 0
	if a.TokenFile != "" {
		kinds++
	}
	if a.AppRole != nil {
		kinds++
		x := *a.AppRole
		checkPath(&x.Path, "approle", "appRole.path", fault)
		required(x.RoleIDFile, "appRole.roleIDFile")
		required(x.SecretIDFile, "appRole.secretIDFile")
		a.AppRole = &x
	}
	if a.Kubernetes != nil {
		kinds++
		x := *a.Kubernetes
		checkPath(&x.Path, "kubernetes", "kubernetes.path", fault)
		required(x.Role, "kubernetes.role")
		if x.TokenFile == "" {
			x.TokenFile = podToken
		}
		a.Kubernetes = &x
	}
	if a.Cert != nil {
		kinds++
		x := *a.Cert
		checkPath(&x.Path, "cert", "cert.path", fault)
		required(x.CertFile, "cert.certFile")
		required(x.KeyFile, "cert.keyFile")
		a.Cert = &x
	}
	if kinds != 1 {
		faults = append(faults, fmt.Errorf("auth: %d kinds are named, and exactly one of tokenFile, appRole, kubernetes and cert is needed", kinds))
	}
	return a, errors.Join(faults...)
}

var (
	// pathForm is a mount's or namespace's path. Vault takes more, but not what a URL could read otherwise.
	pathForm = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*){0,7}$`)
	// refForm is an issuer's id or name (Vault: word characters, dashes and dots inside).
	refForm = regexp.MustCompile(`^\w([\w.-]{0,126}\w)?$`)
)

func checkPath(path *string, otherwise, name string, fault func(string, ...any)) {
	*path = strings.Trim(*path, "/")
	if *path == "" {
		*path = otherwise
	}
	if len(*path) > 256 || !pathForm.MatchString(*path) {
		fault(name+": %.100q is no path of letters, digits, dots, dashes and underscores", *path)
	}
}

func checkAddress(address string) error {
	if address == "" {
		return errors.New(`required, such as "https://vault.example:8200"`)
	}
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		// The text may hold a password, so it is not shown.
		return errors.New(`it is no URL of a scheme and a host alone, such as "https://vault.example:8200"`)
	}
	switch u.Scheme {
	case "https":
		return nil
	case "http":
		if ip, err := netip.ParseAddr(u.Hostname()); u.Hostname() == "localhost" || err == nil && ip.IsLoopback() {
			return nil
		}
		return errors.New("plain http to another machine would show Vault's tokens to the network: use https, or a Vault Agent or Proxy on this machine")
	}
	return fmt.Errorf("the scheme %.20q is neither https nor http", u.Scheme)
}
